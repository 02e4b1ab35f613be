use super::slab::Id;

/// A holder wants a fencing token.
#[derive(Debug)]
pub(super) struct Question {
    /// The request of the holder. `None`: it has lost the lock.
    pub(super) of: Option<Id>,
}

/// What is to be done on a connection, besides acquiring.
#[derive(Clone, Copy, Debug)]
pub(super) enum Errand {
    /// A hold is to be released.
    Release(Id),
    /// A question is to be asked.
    DrawToken(Id),
}
