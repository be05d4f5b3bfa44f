"""Which samples still teach? Input batches are read, the samples that a method keeps are dealt into full batches."""
