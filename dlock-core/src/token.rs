use std::fmt;

/// A fencing token: a number that is greater than every token that an earlier holder drew on the same server.
///
/// What a lock protects rejects writes whose token is lower than one that it has seen. So a holder that has lost its
/// lock without knowing it changes nothing. `docs/guide/fencing.md` in the repository says how, and when a token can go
/// back.
///
/// It is stored as a `BIGINT`: its [`i64`] has the same order and is positive. Tokens of different servers cannot be
/// compared.
///
/// # Examples
///
/// ```
/// use dlock_core::FencingToken;
///
/// let (earlier, later) = (FencingToken::from(41), FencingToken::from(42));
/// assert!(earlier < later);
/// assert_eq!(i64::from(later), 42);
/// assert_eq!(later.to_string(), "42");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken(i64);

impl From<FencingToken> for i64 {
    fn from(token: FencingToken) -> Self {
        token.0
    }
}

/// A token that was stored.
impl From<i64> for FencingToken {
    fn from(number: i64) -> Self {
        Self(number)
    }
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
