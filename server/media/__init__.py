"""Images and videos of requests: fetching, inspection, sampling of frames."""
