//! Distributed locks for `diesel-async` connections. There is nothing here yet: see `dlock-diesel`.
