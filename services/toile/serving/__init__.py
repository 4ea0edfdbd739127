"""The Ray Serve application that holds the models."""
