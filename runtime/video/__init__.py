"""Video: frames in, steadied rankings, annotated video out."""
