"""What a trained model can do on data that it was not trained on."""
