/// How a lock is held: alone, or together with other readers.
///
/// # Examples
///
/// ```
/// use dlock_core::Mode;
///
/// assert_eq!(Mode::default(), Mode::Exclusive);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// One holder at a time.
    #[default]
    Exclusive,
    /// Any number of shared holders, as long as nobody holds the lock exclusively. PostgreSQL and SQLite only.
    Shared,
}
