"""Models: loading them, and the one seam through which routing reaches their experts."""
