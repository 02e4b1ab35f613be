//! From a key to what each server locks. `docs/keys.md` describes the mapping for other languages, and it is frozen.

use std::borrow::Cow;

use siphasher::{sip, sip128};

use super::{InvalidKey, Leaf, LockKey, PostgresKey};

/// SipHash's key for text and bytes without a namespace.
const TEXT: &[u8; 16] = b"dlock text/bytes";

/// SipHash's key for all other keys, whose message has a structure.
pub(super) const STRUCTURED: &[u8; 16] = b"dlock structured";

/// What is wrong with an empty key.
pub(super) const EMPTY: &str = "is empty, which nearly always is a missing setting: \
                                name what is locked in at least one character";

/// The first of the numbers that hashed keys get for SQLite, and the number of hashes.
pub(super) const SQLITE_HASHED: u64 = 1 << 60;

/// The start of hashed lock names. Verbatim names never start with it.
pub(super) const RESERVED: &str = "dlock:";

/// In characters. [`RESERVED`], the readable part, a colon and the hash together fill the 64 that MySQL allows.
const LONGEST_READABLE: usize = 25;

impl LockKey {
    /// The key in the form that PostgreSQL's advisory lock functions accept.
    ///
    /// An `i64` and a pair stay as they are. Text, bytes and namespaced keys become 64 bits of SipHash: two of them
    /// are the same lock with a probability of 1 in 2⁶⁴.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// assert_eq!(LockKey::from(42).to_postgres()?, PostgresKey::BigInt(42));
    /// assert_eq!(LockKey::from((1, -2)).to_postgres()?, PostgresKey::Pair(1, -2));
    ///
    /// // Frozen: every version returns these numbers.
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
    /// [`InvalidKey`] if the text, the bytes or a namespace is empty, and for a preset that has no such lock on
    /// PostgreSQL.
    pub fn to_postgres(&self) -> Result<PostgresKey, InvalidKey> {
        if self.namespaces.is_empty() {
            match &self.leaf {
                Leaf::Integer(number) => return Ok(PostgresKey::BigInt(*number)),
                Leaf::Pair(first, second) => return Ok(PostgresKey::Pair(*first, *second)),
                Leaf::Preset(preset, key) => {
                    let map = preset
                        .postgres
                        .ok_or_else(|| self.has_no_lock_on("PostgreSQL"))?;
                    return map(key).map_err(|problem| self.invalid(problem));
                }
                Leaf::Semaphore(key, lock) => {
                    return Ok(PostgresKey::BigInt(key.semaphore_to_postgres(*lock)?));
                }
                Leaf::Bytes(_) => {}
            }
        }
        Ok(PostgresKey::BigInt(self.hash()? as i64))
    }

    /// The key as a lock name for MySQL and MariaDB: ASCII, lower case, 1 to 64 characters.
    ///
    /// Text that already is such a name stays as it is, so that people can read it in the server's tables and other
    /// programs can share the lock. Every other key becomes `dlock:`, a readable part and 128 bits of SipHash.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// assert_eq!(LockKey::from("user/001").to_mysql()?, "user/001");
    ///
    /// // Frozen: every version returns these names.
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
    /// [`InvalidKey`] if the text, the bytes or a namespace is empty, and for a preset that has no such lock on MySQL
    /// and MariaDB.
    pub fn to_mysql(&self) -> Result<String, InvalidKey> {
        if self.namespaces.is_empty() {
            match &self.leaf {
                Leaf::Bytes(bytes) if is_verbatim(bytes) => {
                    return Ok(String::from_utf8_lossy(bytes).into_owned());
                }
                Leaf::Preset(preset, key) => {
                    let map = preset
                        .mysql
                        .ok_or_else(|| self.has_no_lock_on("MySQL and MariaDB"))?;
                    return map(key).map_err(|problem| self.invalid(problem));
                }
                Leaf::Semaphore(key, lock) => return key.semaphore_to_mysql(*lock),
                Leaf::Bytes(_) | Leaf::Integer(_) | Leaf::Pair(..) => {}
            }
        }
        let (hash_key, message) = self.message()?;
        let hash = sip128::SipHasher24::new_with_key(hash_key).hash(&message);
        // Big-endian, so that the digits are in the order of the bytes.
        let hash = u128::from_be_bytes(hash.as_bytes());
        Ok(format!("{RESERVED}{}:{hash:032x}", self.readable()))
    }

    /// The key as the number below 2⁶¹ that dlock locks for SQLite.
    ///
    /// An `i64` from 0 to 2⁶⁰ − 1 stays as it is. Every other key becomes 2⁶⁰ plus 60 bits of SipHash: two of them are
    /// the same lock with a probability of 1 in 2⁶⁰, and none shares a lock with an `i64` that stays as it is.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// assert_eq!(LockKey::from(42).to_sqlite()?, 42);
    ///
    /// // Frozen: every version returns these numbers.
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
    /// [`InvalidKey`] if the text, the bytes or a namespace is empty, and for every preset.
    pub fn to_sqlite(&self) -> Result<u64, InvalidKey> {
        if self.namespaces.is_empty() {
            match &self.leaf {
                Leaf::Integer(number @ 0..) if number.unsigned_abs() < SQLITE_HASHED => {
                    return Ok(number.unsigned_abs());
                }
                Leaf::Preset(..) => return Err(self.has_no_lock_on("SQLite")),
                Leaf::Semaphore(key, lock) => return key.semaphore_to_sqlite(*lock),
                Leaf::Bytes(_) | Leaf::Integer(_) | Leaf::Pair(..) => {}
            }
        }
        Ok(SQLITE_HASHED | (self.hash()? & (SQLITE_HASHED - 1)))
    }

    fn hash(&self) -> Result<u64, InvalidKey> {
        let (hash_key, message) = self.message()?;
        Ok(sip::SipHasher24::new_with_key(hash_key).hash(&message))
    }

    /// What is hashed, and SipHash's key for it.
    ///
    /// A reader who knows SipHash's key can take the message apart in one way only, so no two keys share a message.
    fn message(&self) -> Result<(&'static [u8; 16], Cow<'_, [u8]>), InvalidKey> {
        match &self.leaf {
            Leaf::Bytes(bytes) if self.namespaces.is_empty() && !bytes.is_empty() => {
                Ok((TEXT, Cow::Borrowed(bytes)))
            }
            _ => Ok((STRUCTURED, Cow::Owned(self.structured()?))),
        }
    }

    /// The message of a key that is hashed under [`STRUCTURED`].
    pub(super) fn structured(&self) -> Result<Vec<u8>, InvalidKey> {
        if self.namespaces.iter().any(String::is_empty) {
            return Err(self.invalid(
                "has an empty namespace, which nearly always is a missing setting: \
                 give the namespace at least one character or leave it out",
            ));
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
            Leaf::Bytes(bytes) if bytes.is_empty() => return Err(self.invalid(EMPTY)),
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
            Leaf::Preset(preset, _) => {
                return Err(self.invalid(format!(
                    "has a namespace, in which a key of {} no longer is that library's lock: remove the namespace",
                    preset.name
                )));
            }
            Leaf::Semaphore(..) => {
                return Err(self.invalid(
                    "has a namespace, in which it no longer is a lock of that semaphore: remove the namespace",
                ));
            }
        }
        Ok(message)
    }

    /// The part of a hashed lock name that tells people which lock it is.
    pub(super) fn readable(&self) -> String {
        let mut source = Vec::new();
        for namespace in &self.namespaces {
            source.extend_from_slice(namespace.as_bytes());
            source.push(b'/');
        }
        match &self.leaf {
            Leaf::Bytes(bytes) => source.extend_from_slice(bytes),
            Leaf::Integer(number) => source.extend(number.to_string().bytes()),
            Leaf::Pair(first, second) => source.extend(format!("{first}/{second}").bytes()),
            Leaf::Preset(..) | Leaf::Semaphore(..) => {}
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

    fn has_no_lock_on(&self, server: &str) -> InvalidKey {
        self.invalid(format!(
            "is a preset without a lock on {server}: use a key without a preset there"
        ))
    }
}

/// Whether MySQL and MariaDB accept `bytes` as a lock name that no other name is equal to.
///
/// - Upper case is excluded: MySQL ignores case, MariaDB does not.
/// - Control characters are excluded: both servers cut names at NUL.
/// - Everything beyond ASCII is excluded: MariaDB compares the bytes of the client's character set.
fn is_verbatim(bytes: &[u8]) -> bool {
    (1..=64).contains(&bytes.len())
        && bytes
            .iter()
            .all(|byte| matches!(byte, b' '..=b'~') && !byte.is_ascii_uppercase())
        && !bytes.starts_with(RESERVED.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siphash_gives_its_authors_vectors() {
        let key: [u8; 16] = std::array::from_fn(|i| i as u8);
        let hash = sip::SipHasher24::new_with_key(&key).hash(&key[..15]);
        assert_eq!(hash, 0xa129_ca61_49be_45e5);
        let hash = sip128::SipHasher24::new_with_key(&key).hash(&[]);
        assert_eq!(
            hash.as_bytes(),
            *b"\xa3\x81\x7f\x04\xba\x25\xa8\xe6\x6d\xf6\x72\x14\xc7\x55\x02\x93"
        );
    }

    #[test]
    fn an_empty_key_or_namespace_is_no_lock_on_any_server() {
        for key in [
            "".into(),
            LockKey::namespaced("a", ""),
            LockKey::namespaced("", "a"),
            LockKey::namespaced("a", LockKey::namespaced("", 1)),
        ] {
            assert_eq!(key.to_postgres().unwrap_err().key(), &key);
            assert_eq!(key.to_mysql().unwrap_err().key(), &key);
            assert_eq!(key.to_sqlite().unwrap_err().key(), &key);
        }
    }

    #[test]
    fn numbers_that_are_themselves_for_sqlite_are_below_all_hashes() {
        let last = (1i64 << 60) - 1;
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

    #[test]
    fn a_hashed_name_is_at_most_64_characters() {
        let longest = LockKey::namespaced("x".repeat(300), "y")
            .to_mysql()
            .unwrap();
        assert_eq!(longest.len(), 64);
        assert!(is_lock_name(&longest));
    }

    fn is_lock_name(name: &str) -> bool {
        (1..=64).contains(&name.len())
            && name
                .bytes()
                .all(|byte| matches!(byte, b' '..=b'@' | b'['..=b'~'))
    }
}
