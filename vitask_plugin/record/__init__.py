"""What a VITask checkpoint says of itself: vitask.json, the connector beside it, and what fits what."""
