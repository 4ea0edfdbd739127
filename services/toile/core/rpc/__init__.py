"""The gRPC scaffold: servers, clients, and the errors between them."""
