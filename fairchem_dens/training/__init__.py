"""What is around the model in a step of training, each idea in a file of its own.

`step` puts them together in a trainer that knows nothing of DeNS.
"""
