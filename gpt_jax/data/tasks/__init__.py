"""Says what is learned of a row of data: a row becomes spans of text, each learned or not."""
