"""Old weights and new ones: safe reading, retrofit, export."""
