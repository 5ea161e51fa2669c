//! The doors rule: which room (module) of the agent may `use` which.
//!
//! A connection passes through the rooms of the proxy half in one direction, and none calls back: so each room
//! can be read alone. A room may use the output of the room before it, and the shared rooms. The two halves
//! share only the seam. The scanner reads tokens, not meaning: paths that start at `crate`, or climb there by
//! `super`, in `use` groups and inline; in tests too, since a test that needs another room is a test of both.

use std::fmt;
use std::path::Path;

/// The modules of the two halves. A room in one of them is named with it: `proxy::accept`.
const HALVES: &[&str] = &["node", "proxy"];

/// Rooms that every room may use: the model of the mesh, system calls, settings, the owner of tasks, the load of
/// workers, and observability.
const SHARED: &[&str] = &["mesh", "sys", "config", "drain", "load", "observe"];

/// Rooms of the proxy half that every room of it may use: certificates, the protocol, the limits.
const SHARED_IN_PROXY: &[&str] = &["proxy::identity", "proxy::hbone", "proxy::limits"];

/// The room that all others build on. It uses no other, not even the shared ones.
const BASE: &str = "mesh";

/// The rooms that a connection passes through, in order.
const PIPELINE: &[&str] = &[
    "seam",
    "proxy::accept",
    "proxy::resolve",
    "proxy::authorize",
    "proxy::transport",
    "proxy::connection",
];

/// The rooms that each room may use besides the shared ones.
const DOORS: &[(&str, &[&str])] = &[
    // The protocol between the halves.
    ("seam", &[]),
    ("node::capture", &["seam"]),
    ("node::machine", &["node::capture", "control"]),
    ("node::recording", &["control"]),
    (
        "node::pods",
        &[
            "node::capture",
            "node::machine",
            "node::recording",
            "control",
        ],
    ),
    ("proxy::accept", &["seam"]),
    ("proxy::resolve", &["proxy::accept"]),
    ("proxy::authorize", &["proxy::resolve"]),
    ("proxy::transport", &["proxy::authorize"]),
    ("proxy::hbone", &[]),
    ("proxy::identity", &[]),
    ("proxy::limits", &[]),
    // The order of the rooms, and the threads on which connections pass through them.
    ("proxy::connection", PIPELINE),
    ("proxy::workers", PIPELINE),
    // Fills the stores, in the stores' types, and issues certificates.
    ("control", &["proxy::identity"]),
    ("observe", &["proxy::identity", "proxy::limits"]),
    (BASE, &[]),
    ("sys", &[]),
    ("config", &[]),
    ("drain", &[]),
    ("load", &[]),
];

/// Rooms that no other may use: they build all rooms.
const TOP: &[&str] = &["agent", "cli"];

/// A use of a room that the rule does not allow.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Breach {
    pub(crate) line: usize,
    pub(crate) room: String,
    pub(crate) uses: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, room, uses } = self;
        write!(f, "{line}: {room} uses {uses}")
    }
}

/// Returns the breaches in a file of the agent, given its path from `src`.
pub(crate) fn breaches(path: &Path, text: &str) -> Vec<Breach> {
    let module = module(path);
    let Some(room) = room(&module) else {
        return Vec::new(); // main.rs, lib.rs, node/mod.rs, proxy/mod.rs
    };
    let Some((_, doors)) = DOORS.iter().find(|(name, _)| *name == room) else {
        return Vec::new(); // agent.rs, cli
    };
    let in_proxy = room.starts_with("proxy::");
    let closed = |name: &str| {
        let half = name.split("::").next().unwrap_or_default();
        let known = HALVES.contains(&half)
            || TOP.contains(&name)
            || DOORS.iter().any(|(room, _)| *room == name);
        let shared = SHARED.contains(&name) || in_proxy && SHARED_IN_PROXY.contains(&name);
        known && name != room && !(shared && room != BASE) && !doors.contains(&name)
    };
    Scanner::new(text, &module)
        .uses()
        .into_iter()
        .filter(|(_, name)| closed(name))
        .map(|(line, uses)| Breach {
            line,
            room: room.clone(),
            uses,
        })
        .collect()
}

/// Returns the room that a path from the crate root leads to; `None` if it stops before one.
fn room<S: AsRef<str>>(path: &[S]) -> Option<String> {
    let first = path.first()?.as_ref();
    match HALVES.contains(&first) {
        true => Some(format!("{first}::{}", path.get(1)?.as_ref())),
        false => Some(first.to_owned()),
    }
}

/// Returns the module of a file: `proxy/accept/hbone.rs` is `proxy::accept::hbone`,
/// `proxy/mod.rs` is `proxy`.
fn module(path: &Path) -> Vec<String> {
    let path = path.with_extension("");
    let mut names: Vec<String> = path
        .iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    if names
        .last()
        .is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str()))
    {
        names.pop();
    }
    names
}

/// A line number, and a word or a single other character.
type Token<'a> = (usize, &'a str);

struct Scanner<'a> {
    tokens: Vec<Token<'a>>,
    /// The file's module.
    module: &'a [String],
}

impl<'a> Scanner<'a> {
    fn new(text: &'a str, module: &'a [String]) -> Self {
        Self {
            tokens: tokens(text),
            module,
        }
    }

    /// Returns the room of every path that starts at the crate root or climbs above the file, with its line.
    fn uses(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        // The open inline modules, each with the depth of braces outside it.
        let mut modules = Vec::new();
        let mut braces = 0;
        let mut at = 0;
        while let Some(word) = self.word(at) {
            match word {
                "{" => braces += 1,
                "}" => {
                    braces -= 1;
                    if modules.last() == Some(&braces) {
                        modules.pop();
                    }
                }
                "mod" if self.word(at + 2) == Some("{") => modules.push(braces),
                // `self::super` climbs as `super` does; `x::super` is no path.
                "crate" | "super" => {
                    let (end, climbed) = self.climb(at);
                    let above = match word {
                        "crate" => 0,
                        _ => (self.module.len() + modules.len()).saturating_sub(climbed),
                    };
                    let mut path: Vec<&str> =
                        self.module.iter().take(above).map(String::as_str).collect();
                    // A path that stays in the file's own room needs no door.
                    if room(&path).is_none() {
                        self.follow(end, &mut path, &mut found);
                    }
                    at = end;
                    continue;
                }
                _ => {}
            }
            at += 1;
        }
        found
    }

    /// Skips `crate` or a chain of `super`; returns the index of the rest, and the chain's length.
    fn climb(&self, at: usize) -> (usize, usize) {
        let (mut end, mut climbed) = (at + 1, 1);
        while self.separator(end) && self.word(end + 2) == Some("super") {
            end += 3;
            climbed += 1;
        }
        (end, climbed)
    }

    /// Follows `::name` or `::{…}` after a path that leads to no room yet, until each of its branches
    /// does. A half that is used as a whole counts as a room. Returns the index where the path ends.
    fn follow<'b>(
        &'b self,
        at: usize,
        path: &mut Vec<&'b str>,
        found: &mut Vec<(usize, String)>,
    ) -> usize {
        if !self.separator(at) {
            if let (Some((line, _)), false) = (self.tokens.get(at - 1), path.is_empty()) {
                found.push((*line, path.join("::")));
            }
            return at;
        }
        if self.word(at + 2) != Some("{") {
            return self.step(at + 2, path, found);
        }
        let mut at = at + 3;
        let mut braces = 1;
        let mut head = true;
        while let Some(word) = self.word(at) {
            match word {
                "{" => braces += 1,
                "}" => braces -= 1,
                "," if braces == 1 => head = true,
                _ if head => {
                    head = false;
                    at = self.step(at, path, found);
                    continue;
                }
                _ => {}
            }
            at += 1;
            if braces == 0 {
                break;
            }
        }
        at
    }

    /// Adds the name at `at` to the path.
    fn step<'b>(
        &'b self,
        at: usize,
        path: &mut Vec<&'b str>,
        found: &mut Vec<(usize, String)>,
    ) -> usize {
        let Some((line, name)) = self.tokens.get(at) else {
            return at;
        };
        path.push(name);
        let end = match room(path) {
            Some(room) => {
                found.push((*line, room));
                at + 1
            }
            None => self.follow(at + 1, path, found),
        };
        path.pop();
        end
    }

    fn separator(&self, at: usize) -> bool {
        self.word(at) == Some(":") && self.word(at + 1) == Some(":")
    }

    fn word(&self, at: usize) -> Option<&'a str> {
        self.tokens.get(at).map(|(_, word)| *word)
    }
}

/// Returns the tokens of a text, without comments, strings and characters.
fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while let Some(next) = text[at..].chars().next() {
        let rest = &text[at..];
        let length = if let Some(length) = passed_over(rest) {
            length
        } else if next.is_alphanumeric() || next == '_' {
            let length = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            found.push((line, &rest[..length]));
            length
        } else {
            if !next.is_whitespace() {
                found.push((line, &rest[..next.len_utf8()]));
            }
            next.len_utf8()
        };
        line += rest[..length].matches('\n').count();
        at += length;
    }
    found
}

/// Returns the length of the comment, string or character that `rest` begins with.
fn passed_over(rest: &str) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(block_comment(rest));
    }
    let prefix = rest.len() - rest.trim_start_matches(['b', 'c', 'r']).len();
    let body = &rest[prefix..];
    if prefix <= 2 && rest[..prefix].contains('r') {
        let hashes = body.len() - body.trim_start_matches('#').len();
        if body[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let inside = prefix + hashes + 1;
            let length = rest[inside..]
                .find(&end)
                .map(|found| inside + found + end.len());
            return Some(length.unwrap_or(rest.len()));
        }
    }
    if prefix <= 1 && body.starts_with('"') {
        return Some(prefix + quoted(body, '"'));
    }
    // A lifetime has no closing quote after its first character.
    let mut inside = body.strip_prefix('\'')?.chars();
    let first = inside.next()?;
    (prefix <= 1 && (first == '\\' || inside.next() == Some('\'')))
        .then(|| prefix + quoted(body, '\''))
}

fn quoted(body: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in body.char_indices().skip(1) {
        if !escaped && c == quote {
            return at + 1;
        }
        escaped = !escaped && c == '\\';
    }
    body.len()
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        let here = &rest.as_bytes()[at..];
        if here.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests;
