/// How a session holds a lock.
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
    /// One holder, and no other.
    #[default]
    Exclusive,
    /// Any number of shared holders, and no exclusive one. PostgreSQL and SQLite only.
    Shared,
}
