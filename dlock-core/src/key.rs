use std::borrow::Cow;
use std::fmt;

#[cfg(all(
    feature = "sqlalchemy-dlock",
    any(feature = "postgres", feature = "mysql")
))]
use crate::sqlalchemy_dlock;

/// SipHash's key for text and bytes without a namespace.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
const TEXT: &[u8; 16] = b"dlock text/bytes";

/// SipHash's key for all other keys: what it hashes has a structure.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
const STRUCTURED: &[u8; 16] = b"dlock structured";

/// What a lock is called.
///
/// It is made from text, bytes, an `i64` or a pair of `i32`; functions that take a key take `impl Into<LockKey>`.
/// Distinct keys are distinct locks, whatever their case, accents, length, spaces or NULs. Text is its UTF-8 bytes:
/// `"abc"` and `b"abc"` are one key. The number `42` and the text `"42"` are two.
///
/// A key is not the server's own name for the lock: [`to_postgres`](Self::to_postgres), [`to_mysql`](Self::to_mysql)
/// and [`to_sqlite`](Self::to_sqlite) give that. They never change from version to version, and `docs/keys.md` in the
/// repository describes them for other languages.
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
/// Own types become keys too:
///
/// ```
/// use dlock_core::LockKey;
///
/// struct AccountId(i64);
///
/// impl From<AccountId> for LockKey {
///     fn from(AccountId(id): AccountId) -> Self {
///         LockKey::namespaced("account", id)
///     }
/// }
///
/// fn lock(key: impl Into<LockKey>) -> LockKey {
///     key.into()
/// }
/// assert_eq!(lock(AccountId(7)).to_string(), r#""account"/7"#);
/// assert_eq!(lock(42).to_string(), "42");
/// assert_eq!(lock((1, -2)).to_string(), "(1, -2)");
/// ```
///
/// # Backend differences
///
/// PostgreSQL has locks for each database; MySQL and MariaDB have one set for the whole server, shared by all its
/// applications: there, give each application a [namespace](Self::namespaced). SQLite's locks are those of the database
/// file.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct LockKey {
    /// From the outermost in.
    pub(crate) namespaces: Vec<String>,
    pub(crate) leaf: Leaf,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum Leaf {
    Bytes(Vec<u8>),
    Integer(i64),
    Pair(i32, i32),
    /// Another library's key: see [`LockKey::sqlalchemy_dlock`].
    #[cfg(feature = "sqlalchemy-dlock")]
    SqlalchemyDlock(Box<LockKey>),
}

impl LockKey {
    /// The key `key` of the application, or part of one, called `namespace`.
    ///
    /// It is not a prefix of the text: every namespace keeps its length, so that no two nestings are mistaken for each
    /// other. A namespaced integer or pair is another lock than the plain one.
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
    /// // The first one is the outermost.
    /// let nested = LockKey::namespaced("acme", LockKey::namespaced("billing", 7));
    /// assert_eq!(nested.to_string(), r#""acme"/"billing"/7"#);
    /// ```
    pub fn namespaced(namespace: impl AsRef<str>, key: impl Into<LockKey>) -> LockKey {
        let mut key = key.into();
        key.namespaces.insert(0, namespace.as_ref().to_owned());
        key
    }

    /// A key without a namespace.
    pub(crate) fn plain(leaf: Leaf) -> LockKey {
        LockKey {
            namespaces: Vec::new(),
            leaf,
        }
    }

    /// The key as PostgreSQL's advisory lock functions take it.
    ///
    /// An `i64` and a pair are themselves. Text, bytes and namespaced keys become 64 bits of SipHash, so that two of
    /// them are one lock with a chance of 1 in 2⁶⁴.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// assert_eq!(LockKey::from(42).to_postgres()?, PostgresKey::BigInt(42));
    /// assert_eq!(LockKey::from((1, -2)).to_postgres()?, PostgresKey::Pair(1, -2));
    ///
    /// // Frozen: no version gives other numbers.
    /// let text = LockKey::from("user/001");
    /// assert_eq!(text.to_postgres()?, PostgresKey::BigInt(2222196715328754885));
    /// let bytes = LockKey::from(b"\xff\x00");
    /// assert_eq!(bytes.to_postgres()?, PostgresKey::BigInt(1964558837810019942));
    /// let namespaced_text = LockKey::namespaced("billing", "user/001");
    /// assert_eq!(namespaced_text.to_postgres()?, PostgresKey::BigInt(-5693091758802578424));
    /// let namespaced_integer = LockKey::namespaced("billing", 42);
    /// assert_eq!(namespaced_integer.to_postgres()?, PostgresKey::BigInt(5405785649107408049));
    /// let namespaced_pair = LockKey::namespaced("billing", (1, -2));
    /// assert_eq!(namespaced_pair.to_postgres()?, PostgresKey::BigInt(-1108778876405031002));
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if the text, the bytes or a namespace are empty.
    #[cfg(feature = "postgres")]
    pub fn to_postgres(&self) -> Result<PostgresKey, InvalidKey> {
        if self.namespaces.is_empty() {
            match &self.leaf {
                Leaf::Integer(number) => return Ok(PostgresKey::BigInt(*number)),
                Leaf::Pair(first, second) => return Ok(PostgresKey::Pair(*first, *second)),
                #[cfg(feature = "sqlalchemy-dlock")]
                Leaf::SqlalchemyDlock(key) => {
                    return sqlalchemy_dlock::to_postgres(key)
                        .map(PostgresKey::BigInt)
                        .map_err(|problem| self.invalid(problem));
                }
                Leaf::Bytes(_) => {}
            }
        }
        let (hash_key, message) = self.message()?;
        let hash = siphasher::sip::SipHasher24::new_with_key(hash_key).hash(&message);
        Ok(PostgresKey::BigInt(hash as i64))
    }

    /// The key as a lock name of MySQL and MariaDB: ASCII, lower case, 1 to 64 characters.
    ///
    /// Text that is such a name already stays as it is, so that it can be read in the server's tables and shared with
    /// other programs. Everything else becomes `dlock:`, a readable part and 128 bits of SipHash.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// assert_eq!(LockKey::from("user/001").to_mysql()?, "user/001");
    ///
    /// // Frozen: no version gives other names.
    /// let text = LockKey::from("User/001");
    /// assert_eq!(text.to_mysql()?, "dlock:user/001:71e2652dd87e1f0298a915c98d2bd206");
    /// let bytes = LockKey::from(b"\xff\x00");
    /// assert_eq!(bytes.to_mysql()?, "dlock:__:6735ff3f784fa3fc7a5039f595beb5ce");
    /// let integer = LockKey::from(42);
    /// assert_eq!(integer.to_mysql()?, "dlock:42:443cf475fc4e1d728bcbb37f22a71010");
    /// let pair = LockKey::from((1, -2));
    /// assert_eq!(pair.to_mysql()?, "dlock:1/-2:27a330d96fc7a9ee2593847038589d56");
    /// let namespaced = LockKey::namespaced("billing", "user/001");
    /// assert_eq!(namespaced.to_mysql()?, "dlock:billing/user/001:4f6a492a89b156a025e5e4bae961fb3c");
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if the text, the bytes or a namespace are empty.
    #[cfg(feature = "mysql")]
    pub fn to_mysql(&self) -> Result<String, InvalidKey> {
        if self.namespaces.is_empty() {
            match &self.leaf {
                Leaf::Bytes(bytes) if is_verbatim(bytes) => {
                    return Ok(String::from_utf8_lossy(bytes).into_owned());
                }
                #[cfg(feature = "sqlalchemy-dlock")]
                Leaf::SqlalchemyDlock(key) => {
                    return sqlalchemy_dlock::to_mysql(key)
                        .map_err(|problem| self.invalid(problem));
                }
                _ => {}
            }
        }
        let (hash_key, message) = self.message()?;
        let hash = siphasher::sip128::SipHasher24::new_with_key(hash_key).hash(&message);
        // Big-endian, so that the digits stand in the order of the bytes.
        let hash = u128::from_be_bytes(hash.as_bytes());
        Ok(format!("{RESERVED}{}:{hash:032x}", self.readable()))
    }

    /// The key as a number below 2⁶¹, by which dlock locks it for SQLite.
    ///
    /// An `i64` from 0 to 2⁶⁰ − 1 is itself. Everything else becomes 2⁶⁰ and 60 bits of SipHash, so that two of them are
    /// one lock with a chance of 1 in 2⁶⁰, and none of them is that of such an `i64`.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// assert_eq!(LockKey::from(42).to_sqlite()?, 42);
    ///
    /// // Frozen: no version gives other numbers.
    /// let text = LockKey::from("user/001");
    /// assert_eq!(text.to_sqlite()?, 2222196715328754885);
    /// let bytes = LockKey::from(b"\xff\x00");
    /// assert_eq!(bytes.to_sqlite()?, 1964558837810019942);
    /// let negative = LockKey::from(-42);
    /// assert_eq!(negative.to_sqlite()?, 1423343502318133954);
    /// let pair = LockKey::from((1, -2));
    /// assert_eq!(pair.to_sqlite()?, 1525249331510002902);
    /// let namespaced = LockKey::namespaced("billing", 42);
    /// assert_eq!(namespaced.to_sqlite()?, 1947021135286867121);
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if the text, the bytes or a namespace are empty, and for another library's key.
    #[cfg(feature = "sqlite")]
    pub fn to_sqlite(&self) -> Result<u64, InvalidKey> {
        const HASHED: u64 = 1 << 60;
        if self.namespaces.is_empty() {
            match &self.leaf {
                Leaf::Integer(number @ 0..) if number.unsigned_abs() < HASHED => {
                    return Ok(number.unsigned_abs());
                }
                #[cfg(feature = "sqlalchemy-dlock")]
                Leaf::SqlalchemyDlock(_) => {
                    return Err(self.invalid(
                        "is one of sqlalchemy-dlock, which has no locks for SQLite: use a plain key",
                    ));
                }
                _ => {}
            }
        }
        let (hash_key, message) = self.message()?;
        let hash = siphasher::sip::SipHasher24::new_with_key(hash_key).hash(&message);
        Ok(HASHED | (hash & (HASHED - 1)))
    }

    /// What is hashed, and under which key of SipHash.
    ///
    /// A reader that knows the hash key can take the message apart in one way only, so that no two keys share one.
    #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
    fn message(&self) -> Result<(&'static [u8; 16], Cow<'_, [u8]>), InvalidKey> {
        if self.namespaces.iter().any(String::is_empty) {
            return Err(self.invalid(
                "has an empty namespace, which nearly always is a missing setting: \
                 give the namespace at least one character or leave it out",
            ));
        }
        if let Leaf::Bytes(bytes) = &self.leaf {
            if bytes.is_empty() {
                return Err(self.invalid(
                    "is empty, which nearly always is a missing setting: \
                     name what is locked in at least one character",
                ));
            }
            if self.namespaces.is_empty() {
                return Ok((TEXT, Cow::Borrowed(bytes)));
            }
        }

        let mut message = Vec::new();
        for namespace in &self.namespaces {
            let length = u32::try_from(namespace.len())
                .map_err(|_| self.invalid("has a namespace of 4 GiB or more: shorten it"))?;
            message.push(b'n');
            message.extend_from_slice(&length.to_le_bytes());
            message.extend_from_slice(namespace.as_bytes());
        }
        match &self.leaf {
            Leaf::Bytes(bytes) => {
                message.push(b'b');
                message.extend_from_slice(bytes);
            }
            Leaf::Integer(number) => {
                message.push(b'i');
                message.extend_from_slice(&number.to_le_bytes());
            }
            Leaf::Pair(first, second) => {
                message.push(b'p');
                message.extend_from_slice(&first.to_le_bytes());
                message.extend_from_slice(&second.to_le_bytes());
            }
            #[cfg(feature = "sqlalchemy-dlock")]
            Leaf::SqlalchemyDlock(_) => {
                return Err(self.invalid(
                    "has a key of sqlalchemy-dlock in a namespace, where it is no longer that library's lock: \
                     take it out of the namespace",
                ));
            }
        }
        Ok((STRUCTURED, Cow::Owned(message)))
    }

    /// The part of a hashed lock name that tells people which lock it is.
    #[cfg(feature = "mysql")]
    fn readable(&self) -> String {
        let mut source = Vec::new();
        for namespace in &self.namespaces {
            source.extend_from_slice(namespace.as_bytes());
            source.push(b'/');
        }
        match &self.leaf {
            Leaf::Bytes(bytes) => source.extend_from_slice(bytes),
            Leaf::Integer(number) => source.extend(number.to_string().bytes()),
            Leaf::Pair(first, second) => source.extend(format!("{first}/{second}").bytes()),
            #[cfg(feature = "sqlalchemy-dlock")]
            Leaf::SqlalchemyDlock(_) => {}
        }
        source
            .iter()
            .take(LONGEST_READABLE)
            .map(|byte| match byte.to_ascii_lowercase() {
                kept @ (b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'/' | b'-') => char::from(kept),
                _ => '_',
            })
            .collect()
    }

    #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
    fn invalid(&self, problem: &'static str) -> InvalidKey {
        InvalidKey {
            key: self.clone(),
            problem,
        }
    }
}

/// What verbatim lock names never start with.
#[cfg(feature = "mysql")]
const RESERVED: &str = "dlock:";

/// In characters; with [`RESERVED`], a colon and the hash: the 64 that MySQL allows.
#[cfg(feature = "mysql")]
const LONGEST_READABLE: usize = 25;

/// Whether MySQL and MariaDB take `bytes` for themselves alone.
///
/// Upper case is out since MySQL folds case (and accents), MariaDB does not; control characters since both cut names
/// at NUL; all beyond ASCII since MariaDB compares it in the bytes of the client's character set.
#[cfg(feature = "mysql")]
fn is_verbatim(bytes: &[u8]) -> bool {
    (1..=64).contains(&bytes.len())
        && bytes
            .iter()
            .all(|byte| matches!(byte, b' '..=b'~') && !byte.is_ascii_uppercase())
        && !bytes.starts_with(RESERVED.as_bytes())
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

// The only integer, so that a bare literal needs no type. A second impl would make `42.into()` ambiguous.
impl From<i64> for LockKey {
    fn from(number: i64) -> Self {
        LockKey::plain(Leaf::Integer(number))
    }
}

impl From<(i32, i32)> for LockKey {
    fn from((first, second): (i32, i32)) -> Self {
        LockKey::plain(Leaf::Pair(first, second))
    }
}

impl From<&LockKey> for LockKey {
    fn from(key: &LockKey) -> Self {
        key.clone()
    }
}

/// Readable and unambiguous: `"user/001"`, `b"\xff"`, `42`, `(1, -2)`, `"billing"/"x"`.
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
            #[cfg(feature = "sqlalchemy-dlock")]
            Leaf::SqlalchemyDlock(key) => write!(f, "sqlalchemy-dlock {key}"),
        }
    }
}

/// The [`Display`](fmt::Display) form in `LockKey(..)`.
impl fmt::Debug for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockKey({self})")
    }
}

/// A [`LockKey`] as PostgreSQL's advisory lock functions take it: in one of their two key spaces.
///
/// `pg_advisory_lock(1)` and `pg_advisory_lock(0, 1)` are two locks.
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
#[cfg(feature = "postgres")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PostgresKey {
    /// One `bigint`.
    BigInt(i64),
    /// Two `integer`s.
    Pair(i32, i32),
}

/// A [`LockKey`] that is no lock on the server.
///
/// It is found before anything is sent. Its message names the key, what is wrong with it and what to do.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "postgres")] {
/// use dlock_core::LockKey;
///
/// let error = LockKey::namespaced("billing", "").to_postgres().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     r#"lock key "billing"/"" is empty, which nearly always is a missing setting: name what is locked in at least one character"#
/// );
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("lock key {key} {problem}")]
#[non_exhaustive]
pub struct InvalidKey {
    key: LockKey,
    problem: &'static str,
}

impl InvalidKey {
    /// The key that was refused.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "mysql")] {
    /// use dlock_core::LockKey;
    ///
    /// let error = LockKey::from("").to_mysql().unwrap_err();
    /// assert_eq!(error.key(), &LockKey::from(""));
    /// # }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn text_is_its_bytes() {
        let forms: [LockKey; 8] = [
            "abc".into(),
            String::from("abc").into(),
            (&String::from("abc")).into(),
            Cow::Borrowed("abc").into(),
            Cow::<str>::Owned("abc".into()).into(),
            b"abc".into(),
            b"abc".as_slice().into(),
            b"abc".to_vec().into(),
        ];
        assert_eq!(HashSet::from(forms).len(), 1);
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

    #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
    #[test]
    fn siphash_gives_its_authors_vectors() {
        let key: [u8; 16] = std::array::from_fn(|i| i as u8);
        let hash = siphasher::sip::SipHasher24::new_with_key(&key).hash(&key[..15]);
        assert_eq!(hash, 0xa129_ca61_49be_45e5);
        let hash = siphasher::sip128::SipHasher24::new_with_key(&key).hash(&[]);
        assert_eq!(
            hash.as_bytes(),
            *b"\xa3\x81\x7f\x04\xba\x25\xa8\xe6\x6d\xf6\x72\x14\xc7\x55\x02\x93"
        );
    }

    #[cfg(feature = "postgres")]
    #[test]
    fn an_empty_key_or_namespace_is_no_lock_on_postgresql() {
        for key in empty_keys() {
            assert_eq!(key.to_postgres().unwrap_err().key(), &key);
        }
    }

    #[cfg(feature = "mysql")]
    #[test]
    fn an_empty_key_or_namespace_is_no_lock_on_mysql() {
        for key in empty_keys() {
            assert_eq!(key.to_mysql().unwrap_err().key(), &key);
        }
    }

    #[cfg(feature = "sqlite")]
    #[test]
    fn an_empty_key_or_namespace_is_no_lock_for_sqlite() {
        for key in empty_keys() {
            assert_eq!(key.to_sqlite().unwrap_err().key(), &key);
        }
    }

    #[cfg(feature = "sqlite")]
    #[test]
    fn numbers_that_are_themselves_for_sqlite_are_below_all_hashes() {
        let last = (1 << 60) - 1;
        for number in [0, 1, last] {
            let key = LockKey::from(number).to_sqlite().unwrap();
            assert_eq!(key, number as u64);
        }
        for hashed in [
            LockKey::from(last + 1),
            i64::MAX.into(),
            (-1).into(),
            i64::MIN.into(),
            (0, 1).into(),
            "1".into(),
            LockKey::namespaced("a", 1),
        ] {
            let key = hashed.to_sqlite().unwrap();
            assert!((1 << 60..1 << 61).contains(&key), "{hashed}: {key}");
        }
    }

    #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
    fn empty_keys() -> [LockKey; 4] {
        [
            "".into(),
            LockKey::namespaced("a", ""),
            LockKey::namespaced("", "a"),
            LockKey::namespaced("a", LockKey::namespaced("", 1)),
        ]
    }

    #[cfg(feature = "mysql")]
    #[test]
    fn only_what_the_server_takes_for_itself_stays_verbatim() {
        for verbatim in [
            "a",
            " ",
            "~",
            "@[`{",
            " user 1 ",
            "dlock",
            "dlock-x",
            "a dlock:",
            &"x".repeat(64),
        ] {
            assert_eq!(LockKey::from(verbatim).to_mysql().unwrap(), verbatim);
        }
        for hashed in [
            "A",
            "Z",
            "\t",
            "\x7f",
            "a\0",
            "é",
            "dlock:",
            "dlock:x",
            &"x".repeat(65),
        ] {
            let name = LockKey::from(hashed).to_mysql().unwrap();
            assert!(name.starts_with(RESERVED) && is_lock_name(&name), "{name}");
        }
    }

    #[cfg(feature = "mysql")]
    #[test]
    fn a_hashed_name_is_at_most_64_characters() {
        let longest = LockKey::namespaced("x".repeat(300), "y")
            .to_mysql()
            .unwrap();
        assert_eq!(longest.len(), 64);
        assert!(is_lock_name(&longest));
    }

    #[cfg(feature = "mysql")]
    fn is_lock_name(name: &str) -> bool {
        (1..=64).contains(&name.len())
            && name
                .bytes()
                .all(|byte| matches!(byte, b' '..=b'@' | b'['..=b'~'))
    }
}
