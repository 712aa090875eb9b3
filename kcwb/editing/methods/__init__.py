"""The editors, one a file: each ends in the record (`kcwb.editing.methods.base.EditMethod`) that the registry lists."""
