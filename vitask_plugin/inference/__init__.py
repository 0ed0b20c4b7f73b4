"""What a tuned model is asked: free text and label likelihoods, on any host's decoder."""
