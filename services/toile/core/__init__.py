"""What every part shares: settings, errors, artifacts, catalog, jobs, the gRPC scaffold."""
