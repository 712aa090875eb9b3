from .claims import account as account, compare_edits as compare_edits, edit_claims as edit_claims
