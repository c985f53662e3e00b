"""Devices, checkpoints, logs, stopping: the room that knows meshes and Orbax."""
