"""dsgnn-serve: rank photos over HTTP."""
