"""Collectives: schedules, their proof and price, transports, the communicator."""
