use std::borrow::Cow;

use super::LockKey;

/// The error for a [`LockKey`] that cannot be a lock on the server.
///
/// dlock returns it before it sends anything. The message names the key, the problem and the remedy.
///
/// # Examples
///
/// ```
/// use dlock_core::LockKey;
///
/// let error = LockKey::namespaced("billing", "").to_postgres().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     concat!(
///         r#"lock key "billing"/"" is empty, which nearly always is a missing setting: "#,
///         "name what is locked in at least one character"
///     )
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("lock key {key} {problem}")]
#[non_exhaustive]
pub struct InvalidKey {
    pub(super) key: LockKey,
    pub(super) problem: Cow<'static, str>,
}

impl InvalidKey {
    /// The key that was refused.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// let error = LockKey::from("").to_mysql().unwrap_err();
    /// assert_eq!(error.key(), &LockKey::from(""));
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }
}
