"""From an adapter, anyone's, to the file that a device or an engine serves: reorder, choose, export, describe."""
