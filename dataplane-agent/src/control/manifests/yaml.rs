//! A YAML document as a tree that keeps lines and tags, and a serde deserializer over it that keeps the path.
//!
//! Serde alone tells what is wrong, but not where. Here every error has the line and the field path, also those
//! of checks after parsing ([`Node::line_at`]).

use std::fmt;

use serde::de::{
    self, DeserializeOwned, DeserializeSeed, EnumAccess, Expected, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::{Deserialize, Deserializer, forward_to_deserialize_any};

use super::spelling;

pub(crate) mod each;

/// One YAML node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// The line at which it begins; 0 if unknown.
    pub(crate) line: u64,
    tag: Option<String>,
    value: Value,
}

#[derive(Clone, Debug, PartialEq)]
enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

/// An error, and its place in the document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeError {
    pub(crate) line: Option<u64>,
    pub(crate) field: String,
    pub(crate) what: String,
}

/// Parses all documents of a YAML (or JSON) text as Kubernetes does: `no` and `off` are booleans. Empty
/// documents are left out.
pub(crate) fn documents(text: &str) -> Result<Vec<Node>, NodeError> {
    read_documents(text, false)
}

/// Like [`documents`], by YAML 1.2: only `true` and `false` are booleans.
pub(crate) fn documents_1_2<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, NodeError> {
    read_documents(text, true)
}

fn read_documents<T: DeserializeOwned>(
    text: &str,
    strict_booleans: bool,
) -> Result<Vec<T>, NodeError> {
    let options = serde_saphyr::options! {
        // Enough for the objects of a large cluster; alias bombs are still stopped early.
        budget: serde_saphyr::budget! {
            max_documents: 65_536,
            max_nodes: 8_000_000,
            max_events: 16_000_000,
            max_total_scalar_bytes: 256 << 20,
        },
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: strict_booleans,
        with_snippet: false,
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| NodeError {
        line: error
            .location()
            .map(|at| at.line())
            .filter(|&line| line > 0),
        field: String::new(),
        what: told(&one_line(&error.to_string())),
    })
}

/// Returns the parser's message without its hints to programmers.
fn told(what: &str) -> String {
    let end = what.find(", set DuplicateKeyPolicy").unwrap_or(what.len());
    what[..end].to_owned()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Node {
    /// Returns the value of a map's field.
    pub(crate) fn field(&self, name: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(fields) => fields
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, node)| node),
            _ => None,
        }
    }

    /// Returns an annotation of an object.
    pub(crate) fn annotation(&self, name: &str) -> Option<&str> {
        let annotations = self.field("metadata")?.field("annotations")?;
        annotations.field(name)?.text()
    }

    /// Returns its text, if it is a scalar text.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns its elements, if it is a list.
    pub(crate) fn list(&self) -> Option<&[Node]> {
        match &self.value {
            Value::List(nodes) => Some(nodes),
            _ => None,
        }
    }

    /// Returns the path of the first `null` below it: a half-written line leaves one.
    pub(crate) fn null(&self) -> Option<String> {
        match &self.value {
            Value::Null => Some(String::new()),
            Value::List(nodes) => nodes
                .iter()
                .enumerate()
                .find_map(|(at, node)| node.null().map(|rest| join(&format!("[{at}]"), &rest))),
            Value::Map(fields) => fields
                .iter()
                .find_map(|(key, node)| node.null().map(|rest| join(key, &rest))),
            _ => None,
        }
    }

    /// Returns the line of the deepest part of `path` that exists.
    pub(crate) fn line_at(&self, path: &str) -> u64 {
        let mut line = self.line;
        let mut node = self;
        for step in path.split(['.', '[']).filter(|step| !step.is_empty()) {
            let next = match step.strip_suffix(']') {
                Some(at) => node
                    .list()
                    .zip(at.parse::<usize>().ok())
                    .and_then(|(l, at)| l.get(at)),
                None => node.field(step),
            };
            let Some(next) = next else { break };
            node = next;
            if node.line > 0 {
                line = node.line;
            }
        }
        line
    }

    /// Reads it as a `T`. A `null` field counts as absent, as in Kubernetes.
    pub(crate) fn read<'de, T: Deserialize<'de>>(&'de self) -> Result<T, NodeError> {
        T::deserialize(Reader {
            node: self,
            lenient: false,
        })
        .map_err(|e| e.at(self.line))
    }

    /// Like [`Node::read`], and takes unquoted numbers and booleans as text.
    pub(crate) fn read_lenient<'de, T: Deserialize<'de>>(&'de self) -> Result<T, NodeError> {
        T::deserialize(Reader {
            node: self,
            lenient: true,
        })
        .map_err(|e| e.at(self.line))
    }
}

impl Node {
    /// Returns the names of a map's fields.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        let fields: &[(String, Node)] = match &self.value {
            Value::Map(fields) => fields,
            _ => &[],
        };
        fields.iter().map(|(key, _)| key.as_str())
    }
}

impl NodeError {
    fn at(mut self, line: u64) -> Self {
        if self.line.is_none() && line > 0 {
            self.line = Some(line);
        }
        self
    }

    /// Adds the step from the parent node to the error's path.
    pub(crate) fn below(mut self, step: &str) -> Self {
        self.field = join(step, &self.field);
        self
    }
}

fn join(step: &str, rest: &str) -> String {
    if rest.is_empty() || rest.starts_with('[') {
        format!("{step}{rest}")
    } else {
        format!("{step}.{rest}")
    }
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for NodeError {}

impl de::Error for NodeError {
    fn custom<T: fmt::Display>(what: T) -> Self {
        Self {
            line: None,
            field: String::new(),
            what: one_line(&what.to_string()),
        }
    }

    /// Leaves out the names of our types, which mean nothing to users.
    fn invalid_type(is: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let expected = expected.to_string();
        let expected = match expected.starts_with("struct ") {
            true => "a map",
            false => &expected,
        };
        Self::custom(format_args!("invalid type: {is}, expected {expected}"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(spelling::unknown("field", field, expected))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(spelling::unknown("variant", variant, expected))
    }
}

/// A value with its line and its tag.
#[derive(Deserialize)]
struct Wrapped<T>(serde_saphyr::Spanned<serde_saphyr::Tagged<T>>);

impl<T> Wrapped<T> {
    fn parts(self) -> (u64, Option<String>, T) {
        let Self(spanned) = self;
        let line = spanned.referenced.line();
        let serde_saphyr::Tagged(value, tag) = spanned.value;
        (line, tag, value)
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (line, tag, value) = Wrapped::deserialize(deserializer)?.parts();
        Ok(Self { line, tag, value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

/// A visitor's methods for scalars.
macro_rules! scalars {
    () => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a YAML value")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(Value::Null.into())
        }
        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(Value::Null.into())
        }
        fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
            Ok(Value::Bool(value).into())
        }
        fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
            Ok(Value::Int(value).into())
        }
        fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
            Ok(Value::Uint(value).into())
        }
        fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
            Ok(Value::Float(value).into())
        }
        fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
            Ok(Value::Text(value.to_owned()).into())
        }
        fn visit_string<E>(self, value: String) -> Result<Self::Value, E> {
            Ok(Value::Text(value).into())
        }
    };
}
use scalars;

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;
    scalars!();
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = seq.next_element()? {
            nodes.push(node);
        }
        Ok(Value::List(nodes))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Value::Map(fields))
    }
}

/// A serde deserializer over a node.
#[derive(Clone, Copy)]
struct Reader<'a> {
    node: &'a Node,
    lenient: bool,
}

impl<'a> Reader<'a> {
    fn to(self, node: &'a Node) -> Self {
        Self { node, ..self }
    }

    /// Returns the name in `!Name`. Tags of YAML's core schema are left out.
    fn tag(self) -> Option<&'a str> {
        let tag = self.node.tag.as_deref()?;
        let name = tag.strip_prefix('!')?;
        (!name.is_empty() && !name.starts_with('!')).then_some(name)
    }

    fn as_text<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, NodeError> {
        match self.node.value {
            Value::Int(number) if self.lenient => visitor.visit_string(number.to_string()),
            Value::Uint(number) if self.lenient => visitor.visit_string(number.to_string()),
            Value::Bool(flag) if self.lenient => visitor.visit_string(flag.to_string()),
            _ => self.deserialize_any(visitor),
        }
    }
}

impl<'de> Deserializer<'de> for Reader<'de> {
    type Error = NodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NodeError> {
        if let Some(tag) = self.tag() {
            return Err(de::Error::custom(format_args!("unexpected tag !{tag}")));
        }
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => visitor.visit_i64(*value),
            Value::Uint(value) => visitor.visit_u64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_borrowed_str(value),
            Value::List(nodes) => visitor.visit_seq(Elements {
                reader: self,
                nodes,
                at: 0,
            }),
            Value::Map(fields) => visitor.visit_map(Fields {
                reader: self,
                fields,
                at: 0,
            }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NodeError> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, NodeError> {
        visitor.visit_newtype_struct(self)
    }

    /// Refuses a list, since serde would take its elements for the fields in order. Unknown fields are passed
    /// over, except for near misses of known ones.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, NodeError> {
        match &self.node.value {
            Value::List(_) => Err(de::Error::custom("invalid type: sequence, expected a map")),
            Value::Map(found) => {
                for (key, node) in found
                    .iter()
                    .filter(|(key, _)| !fields.contains(&key.as_str()))
                {
                    if let Some(meant) = fields.iter().find(|field| spelling::is_slip(key, field)) {
                        let what = format!("unknown field `{key}`, did you mean `{meant}`?");
                        let error: NodeError = de::Error::custom(what);
                        return Err(error.at(node.line).below(key));
                    }
                }
                self.deserialize_any(visitor)
            }
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NodeError> {
        self.as_text(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NodeError> {
        self.as_text(visitor)
    }

    /// A plain word is a variant without content; a variant with content is a tagged value.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, NodeError> {
        match (self.tag(), self.node.text()) {
            (Some(name), _) => visitor.visit_enum(Variant {
                name,
                content: Some(self),
            }),
            (None, Some(name)) => visitor.visit_enum(Variant {
                name,
                content: None,
            }),
            (None, None) => Err(de::Error::custom("expected a word or a !Tag")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct
        seq tuple tuple_struct map identifier ignored_any
    }
}

struct Elements<'a> {
    reader: Reader<'a>,
    nodes: &'a [Node],
    at: usize,
}

impl<'de> SeqAccess<'de> for Elements<'de> {
    type Error = NodeError;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, NodeError> {
        let Some(node) = self.nodes.get(self.at) else {
            return Ok(None);
        };
        let step = format!("[{}]", self.at);
        self.at += 1;
        seed.deserialize(self.reader.to(node))
            .map(Some)
            .map_err(|error| error.at(node.line).below(&step))
    }
}

struct Fields<'a> {
    reader: Reader<'a>,
    fields: &'a [(String, Node)],
    at: usize,
}

impl<'de> MapAccess<'de> for Fields<'de> {
    type Error = NodeError;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, NodeError> {
        while self
            .fields
            .get(self.at)
            .is_some_and(|(_, node)| node.value == Value::Null)
        {
            self.at += 1;
        }
        let Some((key, node)) = self.fields.get(self.at) else {
            return Ok(None);
        };
        seed.deserialize(Key(key))
            .map(Some)
            .map_err(|error| error.at(node.line).below(key))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, NodeError> {
        let Some((key, node)) = self.fields.get(self.at) else {
            return Err(de::Error::custom("a value without a key"));
        };
        self.at += 1;
        seed.deserialize(self.reader.to(node))
            .map_err(|error| error.at(node.line).below(key))
    }
}

/// A map's key: a text, or a number if one is asked for.
struct Key<'a>(&'a str);

impl<'de> Deserializer<'de> for Key<'de> {
    type Error = NodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NodeError> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NodeError> {
        match self.0.parse() {
            Ok(number) => visitor.visit_u16(number),
            Err(_) => Err(de::Error::custom(format_args!(
                "`{}` is not a port",
                self.0
            ))),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct Variant<'a> {
    name: &'a str,
    content: Option<Reader<'a>>,
}

impl<'de> EnumAccess<'de> for Variant<'de> {
    type Error = NodeError;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), NodeError> {
        let name: de::value::StrDeserializer<'_, NodeError> = self.name.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> Variant<'de> {
    /// Reads the content without its tag.
    fn content<T>(
        self,
        read: impl FnOnce(Reader<'_>) -> Result<T, NodeError>,
    ) -> Result<T, NodeError> {
        let Some(reader) = self.content else {
            return Err(de::Error::custom(format_args!(
                "`{0}` is written !{0} with a value",
                self.name
            )));
        };
        let bare = Node {
            tag: None,
            ..reader.node.clone()
        };
        read(Reader {
            node: &bare,
            lenient: reader.lenient,
        })
    }
}

impl<'de> VariantAccess<'de> for Variant<'de> {
    type Error = NodeError;

    fn unit_variant(self) -> Result<(), NodeError> {
        match self.content {
            None => Ok(()),
            Some(_) => Err(de::Error::custom(format_args!(
                "`{}` takes no value",
                self.name
            ))),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, NodeError> {
        // Only texts are tagged in the files that we read, so an owned copy will do.
        self.content(|reader| match reader.node.text() {
            Some(text) => Ok(text.to_owned()),
            None => String::deserialize(reader),
        })
        .and_then(|text| seed.deserialize(text.into_deserializer()))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, NodeError> {
        self.content(|reader| match reader.node.list() {
            Some(nodes) if nodes.is_empty() && len == 0 => Ok(()),
            _ => Err(de::Error::custom("expected []")),
        })?;
        visitor.visit_seq(de::value::SeqDeserializer::<_, NodeError>::new(
            std::iter::empty::<()>(),
        ))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, NodeError> {
        Err(de::Error::custom(format_args!(
            "`{}` takes no map",
            self.name
        )))
    }
}
