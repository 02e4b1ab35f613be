//! The name of a lock.
//!
//! `mapping` turns a key into what each server locks. `presets` has the keys of other libraries, one file for each;
//! they build on this file, which knows none of them.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};

mod invalid;
mod mapping;
mod postgres_key;
mod preset;
mod presets;
mod semaphore;

pub use invalid::InvalidKey;
pub use postgres_key::PostgresKey;

/// The name of a lock.
///
/// Every function that needs a key accepts `impl Into<LockKey>`:
///
/// | from | the key |
/// |---|---|
/// | `&str`, `String`, `Cow<str>` | text |
/// | `&[u8]`, `[u8; N]`, `Vec<u8>` | bytes. Text is its UTF-8 bytes: `"abc"` and `b"abc"` are one key |
/// | `i8` to `i64`, `u8` to `u32` | a number, whatever its type. `42` and the text `"42"` are two keys |
/// | `(i32, i32)` | a pair, which PostgreSQL keeps apart from numbers |
/// | `("account", id)` | `id` in a [namespace](Self::namespaced); `id` is anything from this table |
/// | `uuid::Uuid` (feature `uuid`) | its text, hyphenated and in lower case |
///
/// There is no conversion from `u64`, `usize` and `isize`, because they may not fit. Use `i64::try_from(id)?`. The
/// compiler takes a bare literal for an `i32`, so a greater one needs its type: `3_000_000_000_i64`.
///
/// Distinct keys are distinct locks. Case, accents, length, spaces and NULs all count.
///
/// A key is not the name that the server uses. [`to_postgres`](Self::to_postgres), [`to_mysql`](Self::to_mysql) and
/// [`to_sqlite`](Self::to_sqlite) return that name. It never changes between versions. `docs/keys.md` in the repository
/// describes the mapping for other languages.
///
/// # Examples
///
/// ```
/// use dlock_core::LockKey;
///
/// let text = LockKey::from("user/001");
/// assert_eq!(text, LockKey::from(b"user/001"));
/// assert_ne!(LockKey::from(42), LockKey::from("42"));
/// assert_eq!(text.to_string(), r#""user/001""#);
/// ```
///
/// Your own types can be keys:
///
/// ```
/// use dlock_core::LockKey;
///
/// struct AccountId(i64);
///
/// impl From<AccountId> for LockKey {
///     fn from(AccountId(id): AccountId) -> Self {
///         ("account", id).into()
///     }
/// }
///
/// fn lock(key: impl Into<LockKey>) -> LockKey {
///     key.into()
/// }
/// assert_eq!(lock(AccountId(7)).to_string(), r#""account"/7"#);
/// assert_eq!(lock(("account", 7)).to_string(), r#""account"/7"#);
/// assert_eq!(lock(42).to_string(), "42");
/// assert_eq!(lock((1, -2)).to_string(), "(1, -2)");
/// ```
///
/// # Backend differences
///
/// - PostgreSQL: each database has its own locks.
/// - MySQL and MariaDB: all applications of a server share one set of locks. Give each application a
///   [namespace](Self::namespaced).
/// - SQLite: each database file has its own locks.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct LockKey {
    /// The outermost namespace comes first.
    namespaces: Vec<String>,
    leaf: Leaf,
}

/// A key without its namespaces.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Leaf {
    Bytes(Vec<u8>),
    Integer(i64),
    Pair(i32, i32),
    /// The lock that another library takes for this key.
    Preset(&'static Preset, Box<LockKey>),
    /// One of the locks of the semaphore with this key.
    Semaphore(Box<LockKey>, SemaphoreLock),
}

/// One of the locks of a semaphore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SemaphoreLock {
    /// Waiting sessions queue for it, and the one that has it looks for a free slot.
    Gate,
    /// Its holder is inside.
    Slot(u32),
}

/// How another library maps a key to one server.
///
/// The error is what is wrong with the key: the end of a sentence that starts with "lock key ..".
type Map<T> = fn(&LockKey) -> Result<T, &'static str>;

/// How another library maps a key. `None` means that the library has no locks on that server. SQLite has no function
/// here: dlock's locks for SQLite are its own invention, so no other library can share them.
struct Preset {
    /// The library's name, which also tells presets apart.
    name: &'static str,
    postgres: Option<Map<PostgresKey>>,
    mysql: Option<Map<String>>,
}

impl PartialEq for Preset {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Preset {}

impl Hash for Preset {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl LockKey {
    /// The key `key` inside the namespace `namespace`, for example the name of an application or of a kind of object.
    ///
    /// A namespace is not a text prefix. The length of each namespace is part of the key, so different nestings are
    /// different keys. A number or pair in a namespace is a different lock than the plain number or pair.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// let invoice = LockKey::namespaced("billing", "invoice/7");
    /// assert_ne!(invoice, LockKey::from("billing/invoice/7"));
    /// assert_eq!(invoice.to_string(), r#""billing"/"invoice/7""#);
    ///
    /// assert_ne!(LockKey::namespaced("a:b", "c"), LockKey::namespaced("a", "b:c"));
    ///
    /// // The outermost namespace comes first.
    /// let nested = LockKey::namespaced("acme", LockKey::namespaced("billing", 7));
    /// assert_eq!(nested.to_string(), r#""acme"/"billing"/7"#);
    /// ```
    pub fn namespaced(namespace: impl AsRef<str>, key: impl Into<LockKey>) -> LockKey {
        let mut key = key.into();
        key.namespaces.insert(0, namespace.as_ref().to_owned());
        key
    }

    /// A key without a namespace.
    fn plain(leaf: Leaf) -> LockKey {
        LockKey {
            namespaces: Vec::new(),
            leaf,
        }
    }

    /// The error for a list without a key, of which this one stands in the place.
    pub(crate) fn names_nothing(&self) -> InvalidKey {
        self.invalid("stands for an empty list of keys: name at least one")
    }

    /// An error for this key. `problem` continues the sentence "lock key .." and ends with what to do.
    fn invalid(&self, problem: impl Into<Cow<'static, str>>) -> InvalidKey {
        InvalidKey {
            key: self.clone(),
            problem: problem.into(),
        }
    }
}

impl From<&str> for LockKey {
    fn from(text: &str) -> Self {
        text.as_bytes().into()
    }
}

impl From<String> for LockKey {
    fn from(text: String) -> Self {
        text.into_bytes().into()
    }
}

impl From<&String> for LockKey {
    fn from(text: &String) -> Self {
        text.as_bytes().into()
    }
}

impl From<Cow<'_, str>> for LockKey {
    fn from(text: Cow<'_, str>) -> Self {
        text.into_owned().into()
    }
}

impl From<&[u8]> for LockKey {
    fn from(bytes: &[u8]) -> Self {
        bytes.to_vec().into()
    }
}

impl<const N: usize> From<[u8; N]> for LockKey {
    fn from(bytes: [u8; N]) -> Self {
        bytes.to_vec().into()
    }
}

impl<const N: usize> From<&[u8; N]> for LockKey {
    fn from(bytes: &[u8; N]) -> Self {
        bytes.to_vec().into()
    }
}

impl From<Vec<u8>> for LockKey {
    fn from(bytes: Vec<u8>) -> Self {
        LockKey::plain(Leaf::Bytes(bytes))
    }
}

impl From<i64> for LockKey {
    fn from(number: i64) -> Self {
        LockKey::plain(Leaf::Integer(number))
    }
}

/// The integers that always fit into an `i64`.
///
/// `i32` has to be among them: with more than one integer, the compiler takes a bare literal for an `i32`.
macro_rules! from_smaller_integers {
    ($($integer:ty),*) => {$(
        impl From<$integer> for LockKey {
            fn from(number: $integer) -> Self {
                i64::from(number).into()
            }
        }
    )*};
}

from_smaller_integers!(i8, i16, i32, u8, u16, u32);

impl From<(i32, i32)> for LockKey {
    fn from((first, second): (i32, i32)) -> Self {
        LockKey::plain(Leaf::Pair(first, second))
    }
}

/// The same as [`LockKey::namespaced`].
impl<K: Into<LockKey>> From<(&str, K)> for LockKey {
    fn from((namespace, key): (&str, K)) -> Self {
        LockKey::namespaced(namespace, key)
    }
}

/// The hyphenated form in lower case, so the key is the same as that of the text.
#[cfg(feature = "uuid")]
impl From<uuid::Uuid> for LockKey {
    fn from(id: uuid::Uuid) -> Self {
        let mut text = uuid::Uuid::encode_buffer();
        LockKey::from(&*id.hyphenated().encode_lower(&mut text))
    }
}

impl From<&LockKey> for LockKey {
    fn from(key: &LockKey) -> Self {
        key.clone()
    }
}

/// A readable form in which no two keys look alike: `"user/001"`, `b"\xff"`, `42`, `(1, -2)`, `"billing"/"x"`.
impl fmt::Display for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for namespace in &self.namespaces {
            write!(f, "{namespace:?}/")?;
        }
        match &self.leaf {
            Leaf::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => write!(f, "{text:?}"),
                Err(_) => write!(f, "b\"{}\"", bytes.escape_ascii()),
            },
            Leaf::Integer(number) => write!(f, "{number}"),
            Leaf::Pair(first, second) => write!(f, "({first}, {second})"),
            Leaf::Preset(preset, key) => write!(f, "{} {key}", preset.name),
            Leaf::Semaphore(key, SemaphoreLock::Gate) => write!(f, "gate of semaphore {key}"),
            Leaf::Semaphore(key, SemaphoreLock::Slot(slot)) => {
                write!(f, "slot {slot} of semaphore {key}")
            }
        }
    }
}

/// The [`Display`](fmt::Display) form inside `LockKey(..)`.
impl fmt::Debug for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn text_is_its_bytes() {
        let forms: [LockKey; 9] = [
            "abc".into(),
            String::from("abc").into(),
            (&String::from("abc")).into(),
            Cow::Borrowed("abc").into(),
            Cow::<str>::Owned("abc".into()).into(),
            b"abc".into(),
            (*b"abc").into(),
            b"abc".as_slice().into(),
            b"abc".to_vec().into(),
        ];
        assert_eq!(HashSet::from(forms).len(), 1);
    }

    fn key(key: impl Into<LockKey>) -> LockKey {
        key.into()
    }

    #[test]
    fn numbers_are_one_key_whatever_their_type() {
        let forms = [
            key(42i8),
            key(42i16),
            key(42i32),
            key(42i64),
            key(42u8),
            key(42u16),
            key(42u32),
        ];
        assert_eq!(HashSet::from(forms).len(), 1);
        assert_eq!(key(u32::MAX), key(4_294_967_295_i64));
        assert_eq!(key(i8::MIN), key(-128_i64));
    }

    #[test]
    fn literals_need_no_type() {
        let number = 42;
        let negative: LockKey = (-1).into();
        assert_eq!(key(42), key(42i64));
        assert_eq!(key(number), key(42i64));
        assert_eq!(LockKey::from(42), key(42i64));
        assert_eq!(negative, key(-1i64));
        assert_eq!(key((1, -2)), LockKey::plain(Leaf::Pair(1, -2)));
        assert_eq!(LockKey::from((1, -2)), LockKey::plain(Leaf::Pair(1, -2)));
        assert_eq!(key(("a", 7)), LockKey::namespaced("a", 7i64));
        assert_eq!(LockKey::namespaced("a", 7), LockKey::namespaced("a", 7i64));
        assert_eq!([1, 2].map(LockKey::from), [key(1i64), key(2i64)]);
    }

    #[test]
    fn a_tuple_that_starts_with_text_is_a_namespace() {
        let id = String::from("7");
        assert_eq!(key(("account", &id)), LockKey::namespaced("account", "7"));
        assert_eq!(
            key(("account", (1, -2))),
            LockKey::namespaced("account", (1, -2))
        );
        assert_eq!(
            key(("acme", ("account", 7))),
            LockKey::namespaced("acme", LockKey::namespaced("account", 7))
        );
    }

    #[cfg(feature = "uuid")]
    #[test]
    fn a_uuid_is_its_text() {
        let text = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        let id = uuid::Uuid::from_u128(0x67e55044_10b1_426f_9247_bb680e5fe0c8);
        assert_eq!(key(id), key(text));
        assert_eq!(key(id), key(id.to_string()));
        assert_eq!(key(("account", id)), LockKey::namespaced("account", text));
    }

    #[test]
    fn a_borrowed_key_is_the_key() {
        let key = LockKey::namespaced("a", 1);
        assert_eq!(LockKey::from(&key), key);
    }

    #[test]
    fn kinds_and_nestings_are_distinct() {
        let keys = [
            LockKey::from("1"),
            1.into(),
            (0, 1).into(),
            (1, 0).into(),
            "1/0".into(),
            LockKey::namespaced("1", "0"),
            LockKey::namespaced("1", 0),
            LockKey::namespaced("1", (0, 0)),
            LockKey::namespaced("1", LockKey::namespaced("0", "1")),
            LockKey::namespaced("1", "0/1"),
            LockKey::namespaced("1/0", "1"),
            LockKey::namespaced("a:b", "c"),
            LockKey::namespaced("a", "b:c"),
            LockKey::namespaced("a", LockKey::namespaced("b", "c")),
            LockKey::namespaced("b", LockKey::namespaced("a", "c")),
        ];
        let shown: HashSet<String> = keys.iter().map(LockKey::to_string).collect();
        assert_eq!(shown.len(), keys.len());
        let count = keys.len();
        assert_eq!(HashSet::from(keys).len(), count);
    }

    #[test]
    fn display_is_unambiguous() {
        let shown = |key: LockKey| key.to_string();
        assert_eq!(shown("user/001".into()), r#""user/001""#);
        assert_eq!(shown("".into()), r#""""#);
        assert_eq!(shown("a\"b\\\n\0é".into()), r#""a\"b\\\n\0é""#);
        assert_eq!(shown(r"\xff".into()), r#""\\xff""#);
        assert_eq!(shown(b"a\"\\\xff\0".into()), r#"b"a\"\\\xff\x00""#);
        assert_eq!(shown(i64::MIN.into()), "-9223372036854775808");
        assert_eq!(shown((1, -2).into()), "(1, -2)");
        assert_eq!(shown(LockKey::namespaced("a", "b")), r#""a"/"b""#);
        assert_eq!(shown(LockKey::namespaced("a\"/\"b", 1)), r#""a\"/\"b"/1"#);
        assert_eq!(format!("{:?}", LockKey::from("x")), r#"LockKey("x")"#);
    }
}
