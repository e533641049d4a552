"""Problems made here, base models made here, and a second reward."""
