use crate::proto::Request;

/// A key as dlock's SQL functions take it, and the request that asks for it.
#[derive(Clone, Copy, Debug)]
pub struct SqliteKey {
    /// See [`LockKey::to_sqlite`].
    pub(super) key: u64,
    pub(super) request: Request,
}
