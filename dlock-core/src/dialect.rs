use std::fmt::Debug;

use crate::{Fence, InvalidKey, LockKey, Machine, Mode, Statement, Wait};

/// What a kind of server wants to be sent: one type for each, and all knowledge of that server.
///
/// [`Machine`] has an example.
pub trait Dialect {
    /// A key as this server takes it.
    type Key: Clone + Debug + Send + Sync;
    /// Acquires a session's lock.
    type Acquire: Machine;
    /// Releases a session's lock.
    type Release: Machine;

    /// Ends the session, whatever state it is in, so that the server frees what it holds. The answer is an error.
    ///
    /// On SQLite, where no session can be ended, it rolls back, and no hold is freed.
    const END_SESSION: &'static str;

    /// Whether an async connection skips an answer that nobody reads; otherwise the next query is given it.
    const SKIPS_UNREAD_ANSWERS: bool;

    /// Whether the server does not notice that the client of a session that waits is gone as long as there is a message
    /// from it to read.
    const UNREAD_MESSAGES_HIDE_A_CLOSE: bool = false;

    /// The server's form of `key`.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] where the server has none.
    fn key(key: &LockKey) -> Result<Self::Key, InvalidKey>;

    /// Acquires a lock that the session holds until it releases it. In an open transaction there must be a `fence`.
    fn acquire(key: &Self::Key, mode: Mode, wait: Wait, fence: Option<Fence>) -> Self::Acquire;

    /// Releases one hold. If it was acquired with a `fence` and that transaction is still open, it must be given here.
    fn release(key: &Self::Key, mode: Mode, fence: Option<Fence>) -> Self::Release;

    /// As [`acquire`](Self::acquire), and so that the conversation can be [abandoned](Machine::abandon) without a trace;
    /// in an open transaction that may take one more question.
    fn acquire_abandonable(
        key: &Self::Key,
        mode: Mode,
        wait: Wait,
        fence: Option<Fence>,
    ) -> Self::Acquire {
        Self::acquire(key, mode, wait, fence)
    }

    /// As [`release`](Self::release) after [`acquire_abandonable`](Self::acquire_abandonable), and so that the lock is
    /// released too if nobody reads the answer, wherever one message can do that: the statement is the one of the try, which
    /// the driver has prepared.
    fn release_abandonable(key: &Self::Key, mode: Mode, fence: Option<Fence>) -> Self::Release {
        Self::release(key, mode, fence)
    }

    /// What to send, without reading the answer, when a hold is given up by somebody who cannot wait; `None` where
    /// answers have to be read.
    fn release_unread(key: &Self::Key, mode: Mode, transaction: OpenTransaction) -> Option<String>;

    /// Asks whether the session holds the lock: 1 or 0.
    fn is_held(key: &Self::Key, mode: Mode) -> Statement;

    /// Asks who holds the lock or waits for it: rows of six columns, in the order of
    /// [`Holder::from_columns`](crate::Holder::from_columns), `BIGINT, TEXT, TEXT, BIGINT, BIGINT, BIGINT`, the second,
    /// the third and the last of which may be NULL. Each statement says less than the one before and needs fewer
    /// privileges: the first that answers with rows counts.
    fn holders(key: &Self::Key) -> Vec<Statement>;
}

/// A [`Dialect`] whose transactions can hold locks that end with them.
pub trait TransactionDialect: Dialect {
    /// Acquires a lock for the rest of the open transaction.
    type AcquireInTransaction: Machine;
    /// Begins a transaction that holds the lock.
    type Begin: Machine;

    /// Acquires a lock that ends with the transaction that is open.
    fn acquire_in_transaction(
        key: &Self::Key,
        mode: Mode,
        wait: Wait,
        fence: Fence,
    ) -> Self::AcquireInTransaction;

    /// Begins a transaction that holds the lock until it ends, and that sees what earlier holders committed. Only
    /// outside a transaction.
    fn begin(key: &Self::Key, mode: Mode, wait: Wait) -> Self::Begin;
}

/// The transaction that is open when a hold is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenTransaction {
    /// There is none.
    None,
    /// It was begun under the lock, or may have been: it is rolled back first.
    RollBack,
    /// The lock was acquired in it.
    Keep,
}
