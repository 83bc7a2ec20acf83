"""What `torchft doctor` looks at: one small function a question, each returns one `Check`."""
