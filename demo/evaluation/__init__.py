"""Evaluation of a served model: the plan of requests, the client, the answers, scores, tables and plots."""
