// The classes of CANN's graph engine (namespace ge) of which MindSpore keeps objects: each holds as little as its
// callers look at. GE_OPERATORS in the environment names a file; the type of every operator goes there, a line each.
// Built with the old ABI of std::string, as MindSpore's wheels are.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ge {
enum DataType { ANY_TYPE };
enum Format { ANY_FORMAT };

class AscendString {
  std::shared_ptr<std::string> text;

 public:
  AscendString(const char *given);
  const char *GetString() const;
  size_t Hash() const;
  bool operator==(const AscendString &other) const;
  bool operator<(const AscendString &other) const;
};
AscendString::AscendString(const char *given) {
  if (given) text = std::make_shared<std::string>(given);
}
const char *AscendString::GetString() const { return text ? text->c_str() : ""; }
size_t AscendString::Hash() const { return std::hash<std::string>()(GetString()); }
bool AscendString::operator==(const AscendString &other) const { return std::string(GetString()) == other.GetString(); }
bool AscendString::operator<(const AscendString &other) const { return std::string(GetString()) < other.GetString(); }

class StatusFactory {
 public:
  static StatusFactory *Instance();
  std::map<uint32_t, std::string> texts;
};
StatusFactory *StatusFactory::Instance() {
  static StatusFactory factory;
  return &factory;
}

class Shape {
  std::shared_ptr<void> kept;

 public:
  Shape();
  explicit Shape(const std::vector<int64_t> &sides);
  std::vector<int64_t> GetDims() const;
};
Shape::Shape() {}
Shape::Shape(const std::vector<int64_t> &) {}
std::vector<int64_t> Shape::GetDims() const { return {}; }

class TensorDesc {
  std::shared_ptr<void> kept;

 public:
  TensorDesc();
  TensorDesc(const TensorDesc &other);
  TensorDesc(TensorDesc &&other);
  TensorDesc(Shape shape, Format format, DataType type);
  Shape GetShape() const;
  Shape GetOriginShape() const;
};
TensorDesc::TensorDesc() {}
TensorDesc::TensorDesc(const TensorDesc &) {}
TensorDesc::TensorDesc(TensorDesc &&) {}
TensorDesc::TensorDesc(Shape, Format, DataType) {}
Shape TensorDesc::GetShape() const { return Shape(); }
Shape TensorDesc::GetOriginShape() const { return Shape(); }

class Tensor {
  std::shared_ptr<void> kept;

 public:
  Tensor();
  explicit Tensor(const TensorDesc &description);
  Tensor(const TensorDesc &description, const uint8_t *bytes, size_t count);
  TensorDesc GetTensorDesc() const;
};
Tensor::Tensor() {}
Tensor::Tensor(const TensorDesc &) {}
Tensor::Tensor(const TensorDesc &, const uint8_t *, size_t) {}
TensorDesc Tensor::GetTensorDesc() const { return TensorDesc(); }

class TensorType {
  std::shared_ptr<void> kept;

 public:
  TensorType(const std::initializer_list<DataType> &types);
};
TensorType::TensorType(const std::initializer_list<DataType> &) {}

class Promote {
  std::shared_ptr<void> kept;

 public:
  Promote(const std::initializer_list<const char *> &names);
};
Promote::Promote(const std::initializer_list<const char *> &) {}

struct Named {
  std::string name, type;
  std::map<std::string, int> outputs;
};

class Operator {
  void set(const std::string &name, const std::string &type);

 public:
  explicit Operator(const std::string &type);
  Operator(const std::string &name, const std::string &type);
  explicit Operator(const char *type);
  Operator(const char *name, const char *type);
  Operator(const AscendString &name, const AscendString &type);
  virtual ~Operator() = default;
  std::shared_ptr<Named> kept;
  std::string GetName() const;
  std::string GetOpType() const;
  TensorDesc GetOutputDesc(const std::string &output) const;
  TensorDesc GetOutputDesc(uint32_t output) const;
  void DynamicOutputRegister(const char *output, uint32_t count, bool at_the_end);
  void DynamicOutputRegister(const char *output, uint32_t count, const char *type, bool at_the_end);
  int GetDynamicOutputNum(const std::string &output) const;
};
void Operator::set(const std::string &name, const std::string &type) {
  kept = std::make_shared<Named>();
  kept->name = name, kept->type = type;
  const char *path = getenv("GE_OPERATORS");
  FILE *file = path ? fopen(path, "a") : nullptr;
  if (file) fprintf(file, "%s\n", type.c_str()), fclose(file);
}
Operator::Operator(const std::string &type) { set("", type); }
Operator::Operator(const std::string &name, const std::string &type) { set(name, type); }
Operator::Operator(const char *type) { set("", type); }
Operator::Operator(const char *name, const char *type) { set(name, type); }
Operator::Operator(const AscendString &name, const AscendString &type) { set(name.GetString(), type.GetString()); }
std::string Operator::GetName() const { return kept ? kept->name : ""; }
std::string Operator::GetOpType() const { return kept ? kept->type : ""; }
TensorDesc Operator::GetOutputDesc(const std::string &) const { return TensorDesc(); }
TensorDesc Operator::GetOutputDesc(uint32_t) const { return TensorDesc(); }
void Operator::DynamicOutputRegister(const char *output, uint32_t count, bool) { kept->outputs[output] = count; }
void Operator::DynamicOutputRegister(const char *output, uint32_t count, const char *, bool) {
  kept->outputs[output] = count;
}
int Operator::GetDynamicOutputNum(const std::string &output) const {
  return kept->outputs.count(output) ? kept->outputs.at(output) : 0;
}

class OperatorFactory {
 public:
  static Operator CreateOperator(const std::string &name, const std::string &type);
  static Operator CreateOperator(const char *name, const char *type);
  static bool IsExistOp(const std::string &type);
  static bool IsExistOp(const char *type);
};
Operator OperatorFactory::CreateOperator(const std::string &name, const std::string &type) { return Operator(name, type); }
Operator OperatorFactory::CreateOperator(const char *name, const char *type) { return Operator(name, type); }
bool OperatorFactory::IsExistOp(const std::string &) { return true; }
bool OperatorFactory::IsExistOp(const char *) { return true; }

class Graph {
  std::shared_ptr<void> kept;

 public:
  explicit Graph(const std::string &name);
  explicit Graph(const char *name);
  const std::string &GetName() const;
  std::vector<int> GetDirectNode() const;
};
Graph::Graph(const std::string &) {}
Graph::Graph(const char *) {}
const std::string &Graph::GetName() const {
  static std::string name = "graph";
  return name;
}
std::vector<int> Graph::GetDirectNode() const { return {}; }

class GNode {
 public:
  std::vector<int> GetInControlNodes() const;
  std::vector<int> GetOutControlNodes() const;
  std::vector<int> GetOutDataNodesAndPortIndexs(int output) const;
  std::pair<std::shared_ptr<int>, int> GetInDataNodesAndPortIndexs(int input) const;
};
std::vector<int> GNode::GetInControlNodes() const { return {}; }
std::vector<int> GNode::GetOutControlNodes() const { return {}; }
std::vector<int> GNode::GetOutDataNodesAndPortIndexs(int) const { return {}; }
std::pair<std::shared_ptr<int>, int> GNode::GetInDataNodesAndPortIndexs(int) const { return {}; }

class Session {
 public:
  std::shared_ptr<int> GetCompiledGraphSummary(uint32_t graph);
};
std::shared_ptr<int> Session::GetCompiledGraphSummary(uint32_t) { return std::make_shared<int>(0); }
}  // namespace ge
