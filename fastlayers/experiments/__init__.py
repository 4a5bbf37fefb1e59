"""Experiments that train real networks with torch's layers and with fastlayers, side by side."""
