"""Conversations as tokens: chat templates, their ids, and data sets of messages."""
