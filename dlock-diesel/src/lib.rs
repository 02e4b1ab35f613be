//! Distributed locks for Diesel connections.
