//! What a database lock is, without I/O.
