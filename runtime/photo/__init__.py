"""What a photo's file says about itself, and its decoding in a process of its own."""
