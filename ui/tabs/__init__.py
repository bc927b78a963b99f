"""The pages: each module builds one and connects it to the site."""
