"""Text from a trained model: decoding, sampling rules, chat templates."""
