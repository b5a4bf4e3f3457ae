"""What every stage of data preparation shares: its recipe, documents in and out, counts that add up, resumable runs."""
