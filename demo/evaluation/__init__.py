"""Evaluation of a served model: what is asked, the client, the answers, scores, tables and plots."""
