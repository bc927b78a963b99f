"""The pages: each module builds one page and connects it to the site."""
