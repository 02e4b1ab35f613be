use std::fmt::Debug;

use super::{AreYouThere, Ask, Condition, Failure, Hold, Machine, Parting, Request, Session};
use crate::{FencingToken, Holder, LockKey, Report};

/// A kind of server: what it is asked, and what its answers mean. There is one type for each Diesel backend.
pub trait Dialect: 'static {
    /// For people: what it is called.
    const SERVER: &'static str;

    /// A key as this server takes it, with what tells one hold of it from another.
    type Key: Debug + Send + Sync;

    /// Ends the session, whatever state it is in, so that the server frees what it holds: each of these messages is
    /// sent, unless the one before it has shown that the session is gone. Any of them can be cancelled.
    ///
    /// A session of SQLite cannot be ended. There it rolls back, and holds are given up by their [`Request`].
    const END_SESSION: &'static [&'static str];

    /// How a session is asked whether it is there, after an error that may be its end. `None` where none can be lost.
    const ARE_YOU_THERE: Option<AreYouThere>;

    /// Whether diesel-async gives an answer that nobody read to the next query. If so, a connection is broken as soon
    /// as a future that waits for an answer is dropped.
    const UNREAD_ANSWERS_SHIFT: bool = false;

    /// Acquires a session's lock. `None` if the limit passed and [`Ask::name_holders`] is off.
    ///
    /// # Errors
    ///
    /// Refuses without sending anything: an invalid key, an open transaction.
    fn acquire(
        ask: &Ask,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<Self::Key>>>, Failure>;

    /// Acquires a slot of a semaphore. `None` if the limit passed and [`Ask::name_holders`] is off.
    ///
    /// # Errors
    ///
    /// Refuses without sending anything: an invalid key, a number of permits that no semaphore has, an open
    /// transaction.
    fn acquire_slot(
        ask: &Ask,
        permits: u32,
        session: Session,
    ) -> Result<impl Machine<Output = Option<Hold<Self::Key>>>, Failure>;

    /// Releases one hold.
    fn release(hold: Hold<Self::Key>, session: Session) -> impl Machine<Output = ()>;

    /// What to do about a hold whose guard is dropped, by a caller that cannot wait for an answer. `session` is `None`
    /// if the connection is broken.
    fn part(hold: &Hold<Self::Key>, session: Option<Session>) -> Parting;

    /// SQLite: the requests of a hold.
    fn requests(_hold: &Hold<Self::Key>) -> impl Iterator<Item = Request> + use<Self> {
        std::iter::empty()
    }

    /// Asks whether the session holds the lock.
    fn is_held(hold: &Hold<Self::Key>) -> impl Machine<Output = bool>;

    /// Draws a fencing token, if the session holds the lock.
    fn fencing_token(hold: &Hold<Self::Key>) -> impl Machine<Output = FencingToken>;

    /// The condition that is true only in the session that holds the lock, for statements of the caller.
    fn held(hold: &Hold<Self::Key>) -> Condition;

    /// Asks who holds the lock or waits for it.
    ///
    /// # Errors
    ///
    /// An invalid key.
    fn holders(key: &LockKey) -> Result<impl Machine<Output = Vec<Holder>>, Failure>;

    /// Asks who has a slot of a semaphore or waits for one.
    ///
    /// # Errors
    ///
    /// An invalid key, a number of permits that no semaphore has.
    fn slot_holders(
        key: &LockKey,
        permits: u32,
    ) -> Result<impl Machine<Output = Vec<Holder>>, Failure>;

    /// Looks for what would keep locks from excluding, or from being kept. Outside a transaction only: a question that
    /// fails would abort it.
    fn check() -> impl Machine<Output = Report>;
}

/// A [`Dialect`] whose transactions can hold locks that end with them.
pub trait TransactionDialect: Dialect {
    /// Acquires a lock that ends with the open transaction.
    ///
    /// # Errors
    ///
    /// Refuses without sending anything: an invalid key, no open transaction.
    fn acquire_in_transaction(
        ask: &Ask,
        session: Session,
    ) -> Result<impl Machine<Output = Option<()>>, Failure>;

    /// Begins a transaction that holds the lock until it ends, and that sees what earlier holders committed. Only
    /// outside a transaction.
    ///
    /// # Errors
    ///
    /// An invalid key.
    fn begin(ask: &Ask) -> Result<impl Machine<Output = Option<()>>, Failure>;

    /// Draws a fencing token, if the session holds the lock that was asked for. Nothing is amiss with a session that
    /// does not.
    ///
    /// # Errors
    ///
    /// An invalid key.
    fn fencing_token_in_transaction(
        ask: &Ask,
    ) -> Result<impl Machine<Output = FencingToken>, Failure>;
}
