"""Text: documents, splits and encoding; local files, the Hub, the demo."""
