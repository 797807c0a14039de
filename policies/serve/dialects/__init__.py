"""The protocols of clients. Each module turns frames into requests of the service and back, and knows nothing else."""
