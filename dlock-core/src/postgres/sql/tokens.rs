//! Words with which a statement says why it failed.

/// In the DETAIL of an error with which dlock tells something: PostgreSQL quotes the token that it could not read as
/// JSON, in quotation marks of the server's language.
pub(in crate::postgres) const TOKEN_TAKEN: &str = "dlock_taken";
pub(in crate::postgres) const TOKEN_STANDBY: &str = "dlock_standby";
/// Fails with that token where it is evaluated. `concat` is not evaluated by the planner.
pub(super) const IS_STANDBY: &str = "pg_catalog.concat('dlock_standby')::pg_catalog.json";
/// The user's `transaction_timeout` might end the session in the middle of the wait.
pub(in crate::postgres) const TOKEN_CUT_SHORT: &str = "dlock_cut_short";
/// The first word of an isolation level.
pub(in crate::postgres) const TOKENS_OF_ISOLATION: [&str; 3] =
    ["repeatable", "serializable", "read"];
pub(in crate::postgres) const TOKEN_RELEASED: &str = "dlock_released";
pub(in crate::postgres) const TOKEN_NOT_HELD: &str = "dlock_not_held";
