"""What a robot needs to be driven by a Triune server."""
