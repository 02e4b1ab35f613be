/// A [`LockKey`](crate::LockKey) in the form that PostgreSQL's advisory lock functions accept: one number or two.
///
/// The two forms never meet: `pg_advisory_lock(1)` and `pg_advisory_lock(0, 1)` are different locks.
///
/// # Examples
///
/// ```
/// use dlock_core::{LockKey, PostgresKey};
///
/// let sql = match LockKey::from((1, 2)).to_postgres()? {
///     PostgresKey::BigInt(key) => format!("SELECT pg_advisory_lock({key})"),
///     PostgresKey::Pair(first, second) => format!("SELECT pg_advisory_lock({first}, {second})"),
/// };
/// assert_eq!(sql, "SELECT pg_advisory_lock(1, 2)");
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PostgresKey {
    /// One `bigint`.
    BigInt(i64),
    /// Two `integer`s.
    Pair(i32, i32),
}
