"""How fast our parts are beside others' (`dist-fusion bench`)."""
