//! The doors rule: which room of the agent may `use` which.
//!
//! A connection walks through the rooms in one direction, and nothing walks back: that is what
//! makes each room readable alone. A room may use the output of the room before it, and what is
//! lent to all. The scanner reads tokens, not meaning: paths that start at `crate`, or climb there
//! by `super`, in `use` groups and inline; in tests too, since a test that needs another room is
//! a test of both.

use std::fmt;
use std::path::Path;

/// What every room may use: the nouns of the mesh, the key cabinet, the words of the wire, the cellar,
/// settings, the spawner, the bounds, the corridor's window.
const LENT: &[&str] = &[
    "mesh", "identity", "hbone", "sys", "config", "drain", "limits", "load", "observe",
];

/// What all stand on: it uses nothing, of what is lent neither.
const GROUND: &str = "mesh";

/// What a room may use besides.
const DOORS: &[(&str, &[&str])] = &[
    // What the node leases to the rooms behind it; they know no more of capture than that.
    ("seam", &[]),
    ("capture", &["seam"]),
    ("accept", &["seam"]),
    ("resolve", &["accept"]),
    ("authorize", &["resolve"]),
    ("transport", &["authorize"]),
    // Fills the stores, in their own types.
    ("control", &["capture"]),
    ("observe", &[]),
    ("hbone", &[]),
    (GROUND, &[]),
    ("identity", &[]),
    ("sys", &[]),
    ("config", &[]),
    ("drain", &[]),
    ("limits", &[]),
    ("load", &[]),
];

/// What is never a room's to use: those that build and walk all rooms.
const ABOVE: &[&str] = &["agent", "cli", "journey"];

/// One use of a room that is not through its door.
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

/// The breaches in a file of the agent, given its path from `src`.
pub(crate) fn breaches(path: &Path, text: &str) -> Vec<Breach> {
    let module = module(path);
    let Some(room) = module.first() else {
        return Vec::new(); // main.rs, lib.rs
    };
    let Some((_, doors)) = DOORS.iter().find(|(name, _)| name == room) else {
        return Vec::new(); // agent.rs, journey.rs, cli
    };
    let closed = |name: &str| {
        let known = ABOVE.contains(&name) || DOORS.iter().any(|(room, _)| *room == name);
        let lent = room != GROUND && LENT.contains(&name);
        known && name != room && !lent && !doors.contains(&name)
    };
    Scanner::new(text, module.len())
        .uses()
        .into_iter()
        .filter(|(_, name)| closed(name))
        .map(|(line, name)| Breach {
            line,
            room: room.clone(),
            uses: name.to_owned(),
        })
        .collect()
}

/// The module that a file is: `accept/hbone.rs` is `accept::hbone`, `accept/mod.rs` is `accept`.
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

/// A word, or one character of anything else, with its line.
type Token<'a> = (usize, &'a str);

struct Scanner<'a> {
    tokens: Vec<Token<'a>>,
    /// How many modules the file is below the crate.
    depth: usize,
}

impl<'a> Scanner<'a> {
    fn new(text: &'a str, depth: usize) -> Self {
        Self {
            tokens: tokens(text),
            depth,
        }
    }

    /// The first name of every path that starts at the crate's top.
    fn uses(&self) -> Vec<Token<'a>> {
        let mut found = Vec::new();
        // Inline modules that are open, by the depth of braces outside them.
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
                    let top = word == "crate" || climbed == self.depth + modules.len();
                    if top {
                        self.first_names(end, &mut found);
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

    /// Passes `crate` or a chain of `super`; returns where the rest starts, and the chain's length.
    fn climb(&self, at: usize) -> (usize, usize) {
        let (mut end, mut climbed) = (at + 1, 1);
        while self.separator(end) && self.word(end + 2) == Some("super") {
            end += 3;
            climbed += 1;
        }
        (end, climbed)
    }

    /// What follows `crate` or its like: `::name`, or the head of each path of `::{…}`.
    fn first_names(&self, at: usize, found: &mut Vec<Token<'a>>) {
        if !self.separator(at) {
            return;
        }
        if self.word(at + 2) != Some("{") {
            found.extend(self.tokens.get(at + 2));
            return;
        }
        let mut braces = 0;
        let mut head = true;
        for token in &self.tokens[at + 2..] {
            match token.1 {
                "{" => braces += 1,
                "}" => braces -= 1,
                "," if braces == 1 => head = true,
                _ if head => {
                    found.push(*token);
                    head = false;
                }
                _ => {}
            }
            if braces == 0 {
                return;
            }
        }
    }

    fn separator(&self, at: usize) -> bool {
        self.word(at) == Some(":") && self.word(at + 1) == Some(":")
    }

    fn word(&self, at: usize) -> Option<&'a str> {
        self.tokens.get(at).map(|(_, word)| *word)
    }
}

/// The text as tokens, without comments, strings and characters.
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

/// The length of the comment, string or character that `rest` begins with.
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
