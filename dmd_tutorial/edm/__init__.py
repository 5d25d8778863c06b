"""The published EDM teachers: their networks, and a loader that runs nothing of their files."""
