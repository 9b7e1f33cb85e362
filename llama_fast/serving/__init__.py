"""Many callers and many requests on one engine: asyncio, and files of requests."""
